-- Notes why a job does not go on, for whoever looks. KEYS: record, lease. ARGV: owner, reason, time to live (ms) where
-- the record holds nothing else. Returns 1, or 0 when the lease was lost.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'waiting', ARGV[2])
if redis.call('HEXISTS', KEYS[1], 'core') == 0 then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 1
