-- Counts a hospital's upload, whose chunks are all stored: once, and only while the sum is open.
-- KEYS: record. ARGV: hospital, contribution (JSON).
-- Without effect on a sum that is over or closed, or when an upload of this hospital is counted already: ask the record.
local record = KEYS[1]
local state = redis.call('HGET', record, 'state')
if state ~= 'open' or redis.call('HEXISTS', record, 'c:' .. ARGV[1]) == 1 then return nil end
redis.call('HSET', record, 'c:' .. ARGV[1], ARGV[2], 'u:' .. ARGV[1], 1)
return 1
