-- Fixes what a closed sum is computed from: an attempt has one sum.
-- KEYS: record. ARGV: digest of the inputs.
-- Returns 'ok' when these are the inputs now, 'other' when others were fixed before, 'open' or 'gone'.
local record = KEYS[1]
local state = redis.call('HGET', record, 'state')
if not state then return 'gone' end
if state == 'open' then return 'open' end
redis.call('HSETNX', record, 'inputs', ARGV[1])
return redis.call('HGET', record, 'inputs') == ARGV[1] and 'ok' or 'other'
