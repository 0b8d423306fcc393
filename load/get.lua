-- wrk: GET /get of random users among the first USERS of the load scripts. Requests are generated before the run, so
-- that the client only sends them.
local users = tonumber(os.getenv("USERS") or "100000")
local path = os.getenv("GET_PATH") or "/get?user_id="
-- KIND: "proxied" adds the headers of a proxy, "encoded" percent-encodes the ids, "unknown" requests unknown users.
local kind = os.getenv("KIND") or "plain"
local requests = {}
local at = 0

function init()
  math.randomseed(tonumber(os.getenv("SEED") or "1"))
  local headers = nil
  if kind == "proxied" then
    headers = {
      ["X-Forwarded-For"] = "203.0.113.7",
      ["X-Forwarded-Proto"] = "https",
      ["Via"] = "1.1 proxy",
      ["Cookie"] = "session=0123456789abcdef",
      ["tracestate"] = "vendor=0123456789",
    }
  end
  local first = kind == "unknown" and 2000000000000 or 1000000000000
  for i = 1, tonumber(os.getenv("REQUESTS") or "16384") do
    local id = string.format("%.0f", first + math.random(0, users - 1))
    if kind == "encoded" then
      id = "%31" .. id:sub(2)
    end
    requests[i] = wrk.format("GET", path .. id, headers)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

-- In the directory of this file.
dofile(debug.getinfo(1, "S").source:match("^@(.-)[^/]*$") .. "report.lua")
