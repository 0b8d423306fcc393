// k6: 90 writes to 10 reads, RATE requests a second. The settings are in gradestore.js.
import { RATE, arrivals, options as optionsOf, report } from "./gradestore.js";

export { read, setup, write } from "./gradestore.js";

export const options = optionsOf(
  { writes: arrivals("write", Math.round(RATE * 0.9)), reads: arrivals("read", Math.round(RATE * 0.1)) },
  ["route:/get", "route:/set"],
);

export const handleSummary = report("write-heavy");
