-- wrk: POST /set of one field of random users among the first USERS. AUTH is base64 of "admin:PASSWORD". Each
-- connection waits DELAY_MS before each request.
local users = tonumber(os.getenv("USERS") or "100000")
local fields = { "postpaid_limit", "spp", "shipping_fee", "return_fee" }
local requests = {}
local at = 0

function init()
  math.randomseed(tonumber(os.getenv("SEED") or "1"))
  local headers = {
    ["Content-Type"] = "application/json",
    ["Authorization"] = "Basic " .. (os.getenv("AUTH") or ""),
  }
  for i = 1, tonumber(os.getenv("REQUESTS") or "16384") do
    local id = string.format("%.0f", 1000000000000 + math.random(0, users - 1))
    local body = string.format('{"user_id":"%s","%s":%d}', id, fields[i % 4 + 1], math.random(0, 1000))
    requests[i] = wrk.format("POST", "/set", headers, body)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

-- In the directory of this file.
dofile(debug.getinfo(1, "S").source:match("^@(.-)[^/]*$") .. "report.lua")
