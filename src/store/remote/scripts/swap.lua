-- Arguments: quota, name, whether a value is expected, which, the new one.
local quota, field, value = tonumber(ARGV[2]), ARGV[3], ARGV[6]
local at = redis.call('ZSCORE', ends, field)
if at and tonumber(at) <= now() then
  use(-present(field))
  remove(field)
  at = false
end
local old = redis.call('HGET', values, field)
local as_expected
if ARGV[4] == '1' then as_expected = old == ARGV[5] else as_expected = not old end
if not as_expected then return {'differs'} end
local before = old and counted(field, #old, at) or 0
local more = counted(field, #value, at) - before
if more > 0 then
  local wanted = tonumber(redis.call('GET', used) or 0) + more
  while wanted > quota do
    if purge() == 0 then return {'quota', whole(wanted)} end
    wanted = tonumber(redis.call('GET', used) or 0) + more
  end
end
put(field, value)
use(more)
return {'swapped'}
