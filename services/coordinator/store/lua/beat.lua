-- Notes that hospitals are connected. KEYS: presence (sorted set by end of presence, Unix ms), details.
-- ARGV: time to live (ms), then hospital and details by turns.
local time = redis.call('TIME')
local ends = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
for i = 2, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], string.format('%.0f', ends), ARGV[i])
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.0f', ends - 86400000))
redis.call('PEXPIRE', KEYS[1], 86400000)
redis.call('PEXPIRE', KEYS[2], 86400000)
return 1
