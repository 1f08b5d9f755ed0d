-- Takes a hospital's report, once, if the attempt's phase asks this hospital for it.
-- KEYS: record, the hospital's token bucket, declined, statements.
-- ARGV: 1 now (Unix ms), 2 tokens a second, 3 burst, 4 kind, 5 round, 6 attempt, 7 hospital, 8 value,
--       9 what the report must name (see `guard` in the record), or empty, 10 '1' to wake the driver at once,
--       11 channel, 12 job id, 13 time to live of declined (s), 14 number of marks m, then m marks that no other
--       hospital may use in the attempt, then name and content of the statements that come with the report, by turns.
-- Returns {'ok', phase} or a refusal: limited, gone, stranger, stale, differs, declined, phase, outside, other, copied.
local record, bucket, declined, statements = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, kind, hospital, value = tonumber(ARGV[1]), ARGV[4], ARGV[7], ARGV[8]

local held = redis.call('HMGET', bucket, 'tokens', 'at')
local burst = tonumber(ARGV[3])
local tokens = tonumber(held[1]) or burst
tokens = math.min(burst, tokens + math.max(0, now - (tonumber(held[2]) or now)) / 1000 * tonumber(ARGV[2]))
if tokens < 1 then return {'limited'} end
redis.call('HSET', bucket, 'tokens', tostring(tokens - 1), 'at', now)
redis.call('PEXPIRE', bucket, math.ceil(burst / tonumber(ARGV[2]) * 1000) + 1000)

-- What was found bad before it came here costs its token like any other report.
if kind == 'refused' then return {'ok', '0'} end

local fields = redis.call('HMGET', record, 'round', 'attempt', 'phase', 'accepts', 'members', 'cohort', 'guard', 'quorum')
local round, attempt, phase, accepts = fields[1], fields[2], fields[3], fields[4]
if not round then return {'gone'} end
local function names(list) return string.find(list, ' ' .. hospital .. ' ', 1, true) end
if not names(fields[6]) then return {'stranger'} end
local function wake() redis.call('PUBLISH', ARGV[11], 'job ' .. ARGV[12]) end

if kind == 'declined' then
  redis.call('HSETNX', declined, hospital, value)
  redis.call('EXPIRE', declined, ARGV[13])
  wake()
  return {'ok', phase}
end
if round ~= ARGV[5] or attempt ~= ARGV[6] then return {'stale', round, attempt} end
local field = 'r:' .. kind .. ':' .. hospital
local before = redis.call('HGET', record, field)
if before == value then return {'ok', phase} end
if before then return {'differs', phase} end
if redis.call('HEXISTS', declined, hospital) == 1 then return {'declined'} end
if accepts ~= kind then return {'phase', phase} end
if not names(fields[5]) then return {'outside', phase} end
if ARGV[9] ~= fields[7] and ARGV[9] ~= '' then return {'other', phase} end
local marks = tonumber(ARGV[14])
for i = 15, 14 + marks do
  local owner = redis.call('HGET', statements, 'mark:' .. ARGV[i])
  if owner and owner ~= hospital then return {'copied', owner} end
end
for i = 15, 14 + marks do redis.call('HSET', statements, 'mark:' .. ARGV[i], hospital) end
for i = 15 + marks, #ARGV, 2 do redis.call('HSET', statements, ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', statements, redis.call('PTTL', record))
redis.call('HSET', record, field, value)
local count = redis.call('HINCRBY', record, 'n:' .. kind, 1)
local quorum = tonumber(fields[8])
if count == quorum then redis.call('HSET', record, 'q:' .. kind, now) end
if count >= quorum or ARGV[10] == '1' then wake() end
return {'ok', phase}
