-- Notes that a hospital's stream has ended, unless a newer one has taken its place. KEYS: presence, details.
-- ARGV: hospital, the details that the ended stream wrote.
if redis.call('HGET', KEYS[2], ARGV[1]) == ARGV[2] then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
end
return 1
