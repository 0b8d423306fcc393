// k6: each iteration sets fields of one user on one node and reads the grade from the next node at the position of
// the write. Checks each field against all writes of this user so far. The settings are in gradestore.js.
import { check } from "k6";
import exec from "k6/execution";

import { FIELDS, RATE, arrivals, get, myNode, options as optionsOf, report, set } from "./gradestore.js";

const USERS_PER_VU = 100;

// An iteration has two requests.
export const options = optionsOf({ smoke: arrivals("smoke", RATE / 2) }, ["route:/get", "route:/set"]);

// The values that this VU has set, by user. Each user belongs to one VU of one run.
const grades = {};

export function setup() {
  return Date.now().toString(36);
}

export function smoke(run) {
  const round = exec.vu.iterationInScenario;
  const user_id = `smoke-${run}-${exec.vu.idInTest}-${round % USERS_PER_VU}`;
  const grade = (grades[user_id] ||= Object.fromEntries([["user_id", user_id], ...FIELDS.map((f) => [f, 0])]));

  // One or two fields, positive or negative, every seventh value 0.
  const patch = { user_id };
  for (const field of [FIELDS[round % 4], FIELDS[(round >> 2) % 4]]) {
    patch[field] = grade[field] = round % 7 ? (round % 2 ? -round : round) : 0;
  }
  const written = set(patch);
  const shown = get(user_id, { "Grade-Position": written.headers["Grade-Position"] }, myNode(1));
  check(shown, { "get: what was set": (r) => r.body === JSON.stringify(grade) });
}

export const handleSummary = report("smoke");
