-- Where a hospital's task stream begins for a watcher. KEYS: stream, table of current tasks. ARGV: cursor, or empty.
-- Returns {cursor to go on from, tasks to send first}. A cursor from a lost store lies in the future, one from long ago
-- before what the stream still holds: both begin anew.
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
local last = newest[1] and newest[1][1] or '0-0'
local oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
local first = oldest[1] and oldest[1][1] or '0-0'
local function parts(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local function before(a, b)
  local a_ms, a_seq = parts(a)
  local b_ms, b_seq = parts(b)
  return a_ms < b_ms or (a_ms == b_ms and a_seq < b_seq)
end
if ARGV[1] ~= '' and not before(last, ARGV[1]) and not before(ARGV[1], first) then return {ARGV[1], {}} end
return {last, redis.call('HVALS', KEYS[2])}
