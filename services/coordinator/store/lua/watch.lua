-- Where a hospital's task stream begins for a watcher. KEYS: stream, table of current tasks. ARGV: cursor, or empty.
-- Returns {cursor to go on from, tasks to send first}. A cursor from a lost store lies in the future: it begins anew.
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
local last = newest[1] and newest[1][1] or '0-0'
local function parts(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
if ARGV[1] ~= '' then
  local ms, seq = parts(ARGV[1])
  local last_ms, last_seq = parts(last)
  if ms < last_ms or (ms == last_ms and seq <= last_seq) then return {ARGV[1], {}} end
end
return {last, redis.call('HVALS', KEYS[2])}
