-- wrk: POST /set of new users, starting with number FIRST, each once.
local user = 1000000000000 + tonumber(os.getenv("FIRST") or "0")
local head = "POST /set HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Basic "
  .. (os.getenv("AUTH") or "") .. "\r\nContent-Length: "

function request()
  local body = string.format('{"user_id":"%.0f","spp":1}', user)
  user = user + 1
  return head .. #body .. "\r\n\r\n" .. body
end

-- In the directory of this file.
dofile(debug.getinfo(1, "S").source:match("^@(.-)[^/]*$") .. "report.lua")
