-- All that a decision about a job's attempt needs, as of one moment. KEYS: record, lease, declined, presence.
-- ARGV: the lease's owner, or empty to look without it; time to live of the lease (ms).
-- Returns nil when the lease was lost, else {record, declined, connected hospitals}.
if ARGV[1] ~= '' then
  if redis.call('GET', KEYS[2]) ~= ARGV[1] then return nil end
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
return {
  redis.call('HGETALL', KEYS[1]),
  redis.call('HGETALL', KEYS[3]),
  redis.call('ZRANGEBYSCORE', KEYS[4], string.format('(%.0f', now_ms), '+inf'),
}
