-- Gives a lease up, if it is still the owner's, and wakes those who wait for it.
-- KEYS: lease. ARGV: owner, channel of wake-ups, job id.
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('PUBLISH', ARGV[2], 'job ' .. ARGV[3])
end
return 1
