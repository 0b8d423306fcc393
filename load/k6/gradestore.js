// Shared by the k6 scripts: nodes, users, requests and their checks, thresholds, the report.
//
// Environment variables of all scripts:
//   NODES      HOST:PORT of write ports, separated by commas. A node's read port is the
//              next one, or follows a slash: HOST:8080/8081                               127.0.0.1:8080
//   RATE       requests a second                                                          500
//   DURATION   of the load                                                                30s
//   USERS      number of users                                                            10000
//   IDS        sequential, numeric or uuid: the ids of load/generate.py                   sequential
//   ZIPF       exponent of Zipf's law: 0 requests all users equally, 1.1 mostly a few     1.1
//   SEED       0: the users exist already                                                 1
//   P99_MS     upper bound of the 99th percentile of latencies                            250
//   VUS        maximum number of requests in flight                                       128
//   REPORT     file for the report, besides stdout
//   GRADESTORE_USERNAME, GRADESTORE_PASSWORD or GRADESTORE_PASSWORD_FILE
import { check } from "k6";
import encoding from "k6/encoding";
import exec from "k6/execution";
import http from "k6/http";

import { idOf } from "./ids.js";
import { zipf } from "./zipf.js";

const setting = (name, otherwise) => __ENV[name] || otherwise;

function number(name, otherwise) {
  const value = Number(setting(name, otherwise));
  if (!(value >= 0)) {
    throw new Error(`${name}=${__ENV[name]}: give a number that is not negative`);
  }
  return value;
}

function password() {
  if (__ENV.GRADESTORE_PASSWORD) {
    return __ENV.GRADESTORE_PASSWORD;
  }
  if (__ENV.GRADESTORE_PASSWORD_FILE) {
    return open(__ENV.GRADESTORE_PASSWORD_FILE).trimEnd();
  }
  throw new Error("no password: set GRADESTORE_PASSWORD, or GRADESTORE_PASSWORD_FILE, as for the node");
}

function node(address) {
  const [, host, write, read] = /^(.+):(\d+)(?:\/(\d+))?$/.exec(address) || [];
  if (!host) {
    throw new Error(`NODES: "${address}" is no HOST:PORT`);
  }
  return { write: `http://${host}:${write}`, read: `http://${host}:${read || Number(write) + 1}` };
}

export const NODES = setting("NODES", "127.0.0.1:8080").split(",").map(node);
export const RATE = number("RATE", 500);
export const DURATION = setting("DURATION", "30s");
export const USERS = number("USERS", 10000);
const VUS = number("VUS", 128);
const P99_MS = number("P99_MS", 250);
const SEEDS_AT_ONCE = 64;
export const FIELDS = ["postpaid_limit", "spp", "shipping_fee", "return_fee"];

const id = idOf(setting("IDS", "sequential"));
const rank = zipf(USERS, number("ZIPF", 1.1));
export const anyUser = () => id(rank());
/// The node of this virtual user, or the node `nth` after it.
export const myNode = (further = 0) => NODES[(exec.vu.idInTest + further) % NODES.length];

const name = setting("GRADESTORE_USERNAME", "admin");
const authorization = `Basic ${encoding.b64encode(`${name}:${password()}`)}`;
const params = (route, headers = {}) => ({ headers, tags: { route, name: route } });
const setHeaders = { "Content-Type": "application/json", Authorization: authorization };
const setParams = params("/set", setHeaders);

export function set(patch, to = myNode()) {
  const answer = http.post(`${to.write}/set`, JSON.stringify(patch), setParams);
  check(answer, { "set: 204 and its position": (r) => r.status === 204 && /^\d+$/.test(r.headers["Grade-Position"]) });
  return answer;
}

export function get(user_id, headers = {}, from = myNode()) {
  const answer = http.get(`${from.read}/get?user_id=${encodeURIComponent(user_id)}`, params("/get", headers));
  check(answer, { "get: 200": (r) => r.status === 200 });
  return answer;
}

/// A backup; its bytes are counted and dropped. A truncated response is a failure.
export function backup(from = myNode()) {
  const how = { ...params("/backup", { Authorization: authorization }), responseType: "none", timeout: "10m" };
  const answer = http.get(`${from.write}/backup`, how);
  check(answer, { "backup: 200": (r) => r.status === 200 });
  return answer;
}

/// A write of one field of a random user.
export function write() {
  const n = exec.scenario.iterationInTest;
  set({ user_id: anyUser(), [FIELDS[n % 4]]: n % 7 ? n : 0 });
}

export function read() {
  get(anyUser());
}

/// A scenario with a fixed rate of starts, independent of responses.
export const arrivals = (what, rate, more = {}) => ({
  executor: "constant-arrival-rate",
  exec: what,
  rate,
  duration: DURATION,
  preAllocatedVUs: VUS,
  ...more,
});

export const ramp = (what, stages, more = {}) => ({
  executor: "ramping-arrival-rate",
  exec: what,
  stages,
  preAllocatedVUs: VUS,
  ...more,
});

/// The options of a script with these scenarios. Each of `timed`, as `route:/get`, has a threshold and a line in the
/// report.
export const options = (scenarios, timed, more = {}) => ({
  scenarios,
  batch: SEEDS_AT_ONCE,
  batchPerHost: SEEDS_AT_ONCE,
  setupTimeout: "10m",
  summaryTrendStats: ["count", "med", "p(95)", "p(99)", "p(99.9)", "max"],
  thresholds: {
    checks: ["rate==1"],
    http_req_failed: ["rate==0"],
    dropped_iterations: ["count==0"],
    ...Object.fromEntries(timed.map((tag) => [`http_req_duration{${tag}}`, ["max>0", `p(99)<${P99_MS}`]])),
    ...more,
  },
});

/// Before the load: sets every field of every user once.
export function setup() {
  if (setting("SEED", "1") === "0") {
    return;
  }
  for (let first = 0; first < USERS; first += SEEDS_AT_ONCE) {
    const users = Array.from({ length: Math.min(SEEDS_AT_ONCE, USERS - first) }, (_, n) => first + n);
    const answers = http.batch(users.map((user) => {
      const grade = Object.fromEntries(FIELDS.map((field, f) => [field, user * 4 + f]));
      const body = JSON.stringify({ user_id: id(user), ...grade });
      return ["POST", `${NODES[user % NODES.length].write}/set`, body, params("seed", setHeaders)];
    }));
    const refused = answers.find((answer) => answer.status !== 204);
    if (refused) {
      exec.test.abort(`${refused.url} answered ${refused.status} ${refused.error || refused.body}`);
    }
  }
}

/// The report of a script, on stdout and in REPORT.
export const report = (script) => (data) => {
  const { metrics } = data;
  const seconds = data.state.testRunDurationMs / 1000;
  const lines = [
    `k6 ${script}: ${NODES.length} node${NODES.length > 1 ? "s" : ""}, ${seconds.toFixed(1)} s with setup`,
    ["", "requests", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "max ms"].map(cell).join(""),
  ];
  for (const [metric, { values }] of Object.entries(metrics)) {
    const [, tag] = /^http_req_duration\{(.*)\}$/.exec(metric) || [];
    if (tag && !tag.includes("expected_response")) {
      const times = ["med", "p(95)", "p(99)", "p(99.9)", "max"].map((stat) => (values[stat] || 0).toFixed(2));
      lines.push([tag, values.count, ...times].map(cell).join(""));
    }
  }
  for (const [metric, { thresholds }] of Object.entries(metrics)) {
    for (const [bound, { ok }] of Object.entries(thresholds || {})) {
      lines.push(`${ok ? "met   " : "MISSED"}  ${metric}: ${bound}`);
    }
  }
  const text = `${lines.join("\n")}\n`;
  return { stdout: text, ...(__ENV.REPORT && { [__ENV.REPORT]: text }) };
};

const cell = (value, column) => (column ? String(value).padStart(10) : String(value).padEnd(20));
