-- wrk: GET /get of random users out of the first USERS that the load scripts make.
-- Requests are made before the run, so that the client has nothing to do but send them.
local users = tonumber(os.getenv("USERS") or "100000")
local path = os.getenv("GET_PATH") or "/get?user_id="
local requests = {}
local at = 0

function init()
  math.randomseed(tonumber(os.getenv("SEED") or "1"))
  for i = 1, tonumber(os.getenv("REQUESTS") or "16384") do
    local id = string.format("%.0f", 1000000000000 + math.random(0, users - 1))
    requests[i] = wrk.format("GET", path .. id)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

-- Beside this file, from wherever wrk was started.
dofile(debug.getinfo(1, "S").source:match("^@(.-)[^/]*$") .. "report.lua")
