// k6: 80 reads to 20 writes for an hour (DURATION), RATE requests a second, and a backup every minute. The settings
// are in gradestore.js. The dashboards show growth; load/soak.py also injects faults.
import { RATE, arrivals, options as optionsOf, report } from "./gradestore.js";

export { backup, read, setup, write } from "./gradestore.js";

const duration = __ENV.DURATION || "1h";

export const options = optionsOf(
  {
    reads: arrivals("read", Math.round(RATE * 0.8), { duration }),
    writes: arrivals("write", Math.round(RATE * 0.2), { duration }),
    backups: arrivals("backup", 1, { duration, timeUnit: __ENV.BACKUP_EVERY || "1m", preAllocatedVUs: 2 }),
  },
  ["route:/get", "route:/set"],
  { "http_req_duration{route:/backup}": ["max>0"] },
);

export const handleSummary = report("soak");
