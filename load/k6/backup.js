// k6: 95 reads to 5 writes, RATE requests a second, while backups are fetched one after the other. The settings are
// in gradestore.js; more USERS make longer backups.
import { DURATION, RATE, arrivals, options as optionsOf, report } from "./gradestore.js";

export { backup, read, setup, write } from "./gradestore.js";

export const options = optionsOf(
  {
    reads: arrivals("read", Math.round(RATE * 0.95)),
    writes: arrivals("write", Math.round(RATE * 0.05)),
    backups: { executor: "constant-vus", exec: "backup", vus: 1, duration: DURATION, gracefulStop: "10m" },
  },
  ["route:/get", "route:/set"],
  { "http_req_duration{route:/backup}": ["max>0"] },
);

export const handleSummary = report("backup");
