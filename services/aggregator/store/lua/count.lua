-- Switches a sum to its next accumulator and counts the contributors in it: all of it, or nothing.
-- KEYS: record, then the chunks of the accumulator before.
-- ARGV: expected version, blob id, size, SHA-256, time to live of the old chunks (s), then hospital and digest by turns.
-- Returns 'ok', 'gone', 'closed' or 'conflict' (another replica was faster).
local record = KEYS[1]
local version = redis.call('HGET', record, 'version')
if not version then return 'gone' end
if redis.call('HGET', record, 'state') ~= 'open' then return 'closed' end
if version ~= ARGV[1] then return 'conflict' end
for i = 6, #ARGV, 2 do
  if redis.call('HEXISTS', record, 'c:' .. ARGV[i]) == 1 then return 'conflict' end
end
for i = 6, #ARGV, 2 do
  redis.call('HSET', record, 'c:' .. ARGV[i], ARGV[i + 1], 'u:' .. ARGV[i], 1)
end
redis.call('HSET', record, 'version', version + 1, 'blob', ARGV[2], 'size', ARGV[3], 'sha256', ARGV[4])
-- A reader may still be on the old chunks: they go a little later.
for i = 2, #KEYS do
  redis.call('EXPIRE', KEYS[i], ARGV[5])
end
return 'ok'
