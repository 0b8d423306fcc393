// k6: every iteration sets some fields of one user and reads the grade back. Checks that the read
// shows what this user's one writer set, field by field, fields of earlier requests included.
//
//   GRADESTORE_PASSWORD=secret k6 run load/smoke.js
//
// Environment: WRITE_URL, READ_URL, GRADESTORE_USERNAME, GRADESTORE_PASSWORD, VUS, DURATION.
import { check } from "k6";
import encoding from "k6/encoding";
import exec from "k6/execution";
import http from "k6/http";

const WRITE_URL = __ENV.WRITE_URL || "http://127.0.0.1:8080";
const READ_URL = __ENV.READ_URL || "http://127.0.0.1:8081";
const NAME_AND_PASSWORD = `${__ENV.GRADESTORE_USERNAME || "admin"}:${__ENV.GRADESTORE_PASSWORD}`;
const FIELDS = ["postpaid_limit", "spp", "shipping_fee", "return_fee"];
const USERS_PER_VU = 100;

export const options = {
  vus: Number(__ENV.VUS || 16),
  duration: __ENV.DURATION || "10s",
  summaryTrendStats: ["med", "p(95)", "p(99)", "max"],
  thresholds: {
    checks: ["rate==1"],
    http_req_failed: ["rate==0"],
    // Generous: k6 shares the machine with the node. A node that hangs still fails.
    "http_req_duration{route:get}": ["p(99)<250"],
    "http_req_duration{route:set}": ["p(99)<250"],
  },
};

const set = {
  headers: {
    "Content-Type": "application/json",
    Authorization: `Basic ${encoding.b64encode(NAME_AND_PASSWORD)}`,
  },
  tags: { route: "set", name: "POST /set" },
};
const get = { tags: { route: "get", name: "GET /get" } };

// What this VU has set so far, by user. Users are of one VU and one run alone.
const grades = {};

export function setup() {
  return { run: Date.now().toString(36) };
}

export default function (data) {
  const round = exec.vu.iterationInScenario;
  const user_id = `smoke-${data.run}-${exec.vu.idInTest}-${round % USERS_PER_VU}`;
  const grade = (grades[user_id] ||= Object.fromEntries([["user_id", user_id], ...FIELDS.map((f) => [f, 0])]));

  // One field or two, of any sign, every seventh time 0.
  const patch = { user_id };
  for (const field of [FIELDS[round % 4], FIELDS[(round >> 2) % 4]]) {
    patch[field] = grade[field] = round % 7 ? (round % 2 ? -round : round) : 0;
  }
  const written = http.post(`${WRITE_URL}/set`, JSON.stringify(patch), set);
  check(written, {
    "set: 204": (r) => r.status === 204,
    "set: Grade-Position": (r) => /^\d+$/.test(r.headers["Grade-Position"]),
  });

  const read = http.get(`${READ_URL}/get?user_id=${user_id}`, get);
  check(read, {
    "get: 200": (r) => r.status === 200,
    "get: what was set": (r) => r.body === JSON.stringify(grade),
  });
}
