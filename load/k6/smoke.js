// k6: every iteration sets some fields of one user on one node and reads the grade back from the next, by its position.
// Checks that the read shows what this user's one writer set, field by field, fields of earlier requests included.
// Settings are in gradestore.js.
import { check } from "k6";
import exec from "k6/execution";

import { FIELDS, RATE, arrivals, get, myNode, options as optionsOf, report, set } from "./gradestore.js";

const USERS_PER_VU = 100;

// An iteration is two requests.
export const options = optionsOf({ smoke: arrivals("smoke", RATE / 2) }, ["route:/get", "route:/set"]);

// What this VU has set so far, by user. Users are of one VU and one run alone.
const grades = {};

export function setup() {
  return Date.now().toString(36);
}

export function smoke(run) {
  const round = exec.vu.iterationInScenario;
  const user_id = `smoke-${run}-${exec.vu.idInTest}-${round % USERS_PER_VU}`;
  const grade = (grades[user_id] ||= Object.fromEntries([["user_id", user_id], ...FIELDS.map((f) => [f, 0])]));

  // One field or two, of any sign, every seventh time 0.
  const patch = { user_id };
  for (const field of [FIELDS[round % 4], FIELDS[(round >> 2) % 4]]) {
    patch[field] = grade[field] = round % 7 ? (round % 2 ? -round : round) : 0;
  }
  const written = set(patch);
  const shown = get(user_id, { "Grade-Position": written.headers["Grade-Position"] }, myNode(1));
  check(shown, { "get: what was set": (r) => r.body === JSON.stringify(grade) });
}

export const handleSummary = report("smoke");
