-- wrk: POST /set of users that are not there yet, from number FIRST on, each once.
local user = 1000000000000 + tonumber(os.getenv("FIRST") or "0")
local head = "POST /set HTTP/1.1\r\nHost: node\r\nContent-Type: application/json\r\nAuthorization: Basic "
  .. (os.getenv("AUTH") or "") .. "\r\nContent-Length: "

function request()
  local body = string.format('{"user_id":"%.0f","spp":1}', user)
  user = user + 1
  return head .. #body .. "\r\n\r\n" .. body
end

-- Beside this file, from wherever wrk was started.
dofile(debug.getinfo(1, "S").source:match("^@(.-)[^/]*$") .. "report.lua")
