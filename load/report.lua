-- wrk: the last line of a run, which compare.py and backup.py read. Loaded by get.lua and set.lua.
function done(summary, latency)
  local errors = 0
  for _, count in pairs(summary.errors) do
    errors = errors + count
  end
  io.write(string.format("requests %d errors %d duration_us %d p50_us %d p99_us %d p999_us %d\n",
    summary.requests, errors, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
