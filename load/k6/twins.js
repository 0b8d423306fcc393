// k6: checks that ids.js generates the ids of load/generate.py (EXPECTED has some, as JSON), and the frequencies of
// zipf.js.
import { check } from "k6";

import { idOf } from "./ids.js";
import { zipf } from "./zipf.js";

const DRAWS = 40_000;
const COUNT = 1000;

export const options = { thresholds: { checks: ["rate==1"] } };

// Its own generator, so that the draws are reproducible.
function seeded() {
  let state = 1;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

export default function () {
  const expected = JSON.parse(__ENV.EXPECTED);
  for (const [kind, ids] of Object.entries(expected)) {
    for (const [user, id] of Object.entries(ids)) {
      check(idOf(kind)(Number(user)), { [`${kind} id of user ${user}`]: (made) => made === id });
    }
  }
  for (const skew of [0, 0.8, 1, 1.1, 2]) {
    const drawn = new Array(COUNT).fill(0);
    const draw = zipf(COUNT, skew, seeded());
    for (let n = 0; n < DRAWS; n += 1) {
      drawn[draw()] += 1;
    }
    const sum = drawn.reduce((total, _, k) => total + (k + 1) ** -skew, 0);
    for (const k of [0, 1, 2, 9, 99]) {
      const due = (DRAWS * (k + 1) ** -skew) / sum;
      // Five standard deviations.
      check(drawn[k], { [`skew ${skew}, rank ${k + 1}`]: (times) => Math.abs(times - due) < 5 * Math.sqrt(due) });
    }
    check(drawn, { [`skew ${skew}, nothing else`]: (all) => all.length === COUNT });
  }
}
