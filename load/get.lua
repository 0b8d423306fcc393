-- wrk: GET /get of random users out of the first USERS that the load scripts make.
-- Requests are made before the run, so that the client has nothing to do but send them.
local users = tonumber(os.getenv("USERS") or "100000")
local requests = {}
local at = 0

function init()
  math.randomseed(tonumber(os.getenv("SEED") or "1"))
  for i = 1, 16384 do
    local id = string.format("%.0f", 1000000000000 + math.random(0, users - 1))
    requests[i] = wrk.format("GET", "/get?user_id=" .. id)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  io.write(string.format("requests %d errors %d duration_us %d p50_us %d p99_us %d p999_us %d\n",
    summary.requests,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout,
    summary.duration, latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
