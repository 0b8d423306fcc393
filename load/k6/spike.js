// k6: RATE writes a second for DURATION, then SPIKE times as many for SPIKE_DURATION, then RATE again. In the spike
// writes may be slow; no request may fail, and afterwards the latency must be as before. The settings are in
// gradestore.js.
import { DURATION, RATE, arrivals, options as optionsOf, ramp, report } from "./gradestore.js";

export { setup, write } from "./gradestore.js";

const SPIKE = Number(__ENV.SPIKE || 5);
const SPIKE_DURATION = __ENV.SPIKE_DURATION || "10s";

function seconds(time) {
  if (!/^\d+s$/.test(time)) {
    throw new Error(`${time} as DURATION or SPIKE_DURATION: give whole seconds, as 30s`);
  }
  return parseInt(time, 10);
}

const spikeStarts_s = seconds(DURATION);
const afterStarts_s = spikeStarts_s + 1 + seconds(SPIKE_DURATION) + 1;

export const options = optionsOf(
  {
    before: arrivals("write", RATE),
    spike: ramp("write", [
      { target: RATE * SPIKE, duration: "1s" },
      { target: RATE * SPIKE, duration: SPIKE_DURATION },
      { target: RATE, duration: "1s" },
    ], { startRate: RATE, startTime: `${spikeStarts_s}s` }),
    after: arrivals("write", RATE, { startTime: `${afterStarts_s}s` }),
  },
  ["scenario:before", "scenario:after"],
  {
    "http_req_duration{scenario:spike}": ["max>0", "max<5000"],
    // In the spike all VUs may be busy; k6 then drops iterations, which is not the node's limit.
    "dropped_iterations{scenario:spike}": [],
    dropped_iterations: [],
    "dropped_iterations{scenario:before}": ["count==0"],
    "dropped_iterations{scenario:after}": ["count==0"],
  },
);

export const handleSummary = report("spike");
