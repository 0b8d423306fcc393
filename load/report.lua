-- wrk: prints the last line of a run, which the Python scripts parse, and delays requests. Loaded by the other
-- scripts.
function done(summary, latency)
  local errors = 0
  for what, count in pairs(summary.errors) do
    -- 404 is the right response for unknown users.
    if what ~= "status" or os.getenv("KIND") ~= "unknown" then
      errors = errors + count
    end
  end
  io.write(string.format("requests %d errors %d duration_us %d p50_us %d p99_us %d p999_us %d\n",
    summary.requests, errors, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end

-- DELAY_MS is the mean; with DELAY_SPREAD=1 each delay is random, so that connections do not synchronize.
local delay_ms = tonumber(os.getenv("DELAY_MS") or "0")
if delay_ms > 0 then
  local spread = os.getenv("DELAY_SPREAD") == "1"
  function delay()
    return spread and math.random(1, 2 * delay_ms - 1) or delay_ms
  end
end
