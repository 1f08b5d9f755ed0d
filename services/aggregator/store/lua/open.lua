-- Makes a sum's record, or says whether the one that is there has the same content.
-- KEYS: record. ARGV: content (JSON of what it is opened with), expiry (Unix ms).
-- Returns 1 when it is open or was opened with the same content, 0 when another content stands there.
local before = redis.call('HGET', KEYS[1], 'content')
if before then
  return before == ARGV[1] and 1 or 0
end
redis.call('HSET', KEYS[1], 'content', ARGV[1], 'state', 'open', 'expires_ms', ARGV[2])
redis.call('PEXPIREAT', KEYS[1], ARGV[2])
return 1
