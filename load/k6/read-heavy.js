// k6: 95 reads to 5 writes, RATE requests a second. The settings are in gradestore.js.
import { RATE, arrivals, options as optionsOf, report } from "./gradestore.js";

export { read, setup, write } from "./gradestore.js";

export const options = optionsOf(
  { reads: arrivals("read", Math.round(RATE * 0.95)), writes: arrivals("write", Math.round(RATE * 0.05)) },
  ["route:/get", "route:/set"],
);

export const handleSummary = report("read-heavy");
