-- Takes a job's lease when nobody has it. KEYS: lease, fence. ARGV: nonce, time to live (ms), time to live of the fence.
-- Returns the owner's mark (`<token>:<nonce>`, the token higher than any before it), or nil when another has it.
if redis.call('EXISTS', KEYS[1]) == 1 then return nil end
local owner = redis.call('INCR', KEYS[2]) .. ':' .. ARGV[1]
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('SET', KEYS[1], owner, 'PX', ARGV[2])
return owner
