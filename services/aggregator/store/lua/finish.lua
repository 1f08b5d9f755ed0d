-- Switches a sum to a result, whose segments are all stored. All results of the same inputs are the same bytes.
-- KEYS: record. ARGV: digest of the inputs, blob, SHA-256.
-- Returns 'ok', 'other' when it had other bytes before, or 'gone' when there is no sum with these inputs.
local record = KEYS[1]
if redis.call('HGET', record, 'inputs') ~= ARGV[1] then return 'gone' end
local sha256 = redis.call('HGET', record, 'sum_sha256')
if sha256 and sha256 ~= ARGV[3] then return 'other' end
redis.call('HSET', record, 'state', 'computed', 'sum', ARGV[2], 'sum_sha256', ARGV[3])
return 'ok'
