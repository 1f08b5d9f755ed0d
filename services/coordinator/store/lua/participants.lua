-- The connected hospitals. KEYS: presence, details. Returns hospital and details by turns.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], string.format('(%.0f', now_ms), '+inf')) do
  local details = redis.call('HGET', KEYS[2], name)
  if details then
    answer[#answer + 1] = name
    answer[#answer + 1] = details
  end
end
return answer
