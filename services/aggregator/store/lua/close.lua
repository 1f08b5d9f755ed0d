-- Fixes who was counted when there are enough. KEYS: record. ARGV: least number of contributors.
-- Returns the record's fields and values, or the number of contributors when there are too few, or nil without a record.
local record = KEYS[1]
local state = redis.call('HGET', record, 'state')
if not state then return nil end
local fields = redis.call('HGETALL', record)
if state == 'open' then
  local count = 0
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'c:' then count = count + 1 end
  end
  if count < tonumber(ARGV[1]) then return count end
  redis.call('HSET', record, 'state', 'closed')
  fields = redis.call('HGETALL', record)
end
return fields
