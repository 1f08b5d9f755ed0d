-- Moves a job's attempt on and hands out the tasks that follow from it: all of it, or nothing.
-- KEYS: record, lease, index of jobs, statements, then for each task the hospital's stream and its table of current
--       tasks.
-- ARGV: 1 owner, 2 expected version, 3 expiry of the keys (Unix ms), 4 '1' to drop what hospitals sent in the attempt
--       before, 5 job id, 6 '1' when the job has ended, 7 channel, 8 most tasks in a stream, 9 number of fields n, then n
--       field names and values by turns, then the number of statements m, then m names and contents by turns, then for
--       each task the hospital and the task.
-- Returns 'ok', 'lost' (the lease) or 'conflict' (the record is not what the decision was made on).
local record, lease, jobs, statements = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
if redis.call('GET', lease) ~= ARGV[1] then return 'lost' end
if (redis.call('HGET', record, 'version') or '0') ~= ARGV[2] then return 'conflict' end
if ARGV[4] == '1' then redis.call('DEL', record, statements) end
local at = 9
local function put(key)
  local last = at + 2 * tonumber(ARGV[at])
  for i = at + 1, last, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
  at = last + 1
end
put(record)
put(statements)
redis.call('HSET', record, 'version', ARGV[2] + 1)
redis.call('PEXPIREAT', record, ARGV[3])
redis.call('PEXPIREAT', statements, ARGV[3])
if ARGV[6] == '1' then
  redis.call('SREM', jobs, ARGV[5])
else
  redis.call('SADD', jobs, ARGV[5])
  redis.call('PEXPIREAT', jobs, ARGV[3])
end
local names = {}
for key = 5, #KEYS, 2 do
  local stream, current = KEYS[key], KEYS[key + 1]
  names[#names + 1] = ARGV[at]
  redis.call('XADD', stream, 'MAXLEN', '~', ARGV[8], '*', 't', ARGV[at + 1])
  redis.call('PEXPIREAT', stream, ARGV[3])
  if ARGV[6] == '1' then
    redis.call('HDEL', current, ARGV[5])
  else
    redis.call('HSET', current, ARGV[5], ARGV[at + 1])
    redis.call('PEXPIREAT', current, ARGV[3])
  end
  at = at + 2
end
if #names > 0 then redis.call('PUBLISH', ARGV[7], 'tasks ' .. table.concat(names, ' ')) end
return 'ok'
