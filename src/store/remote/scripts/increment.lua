-- What increment-fast.lua left to do.
local quota, field, delta = tonumber(ARGV[2]), ARGV[3], ARGV[4]
local at = redis.call('ZSCORE', ends, field)
if at and tonumber(at) <= now() then
  use(-present(field))
  remove(field)
  at = false
end
local old = redis.call('HGET', values, field)
if old and old ~= '0' and not string.find(old, '^-?[1-9]%d*$') then
  -- Text of a number that the engine does not take for one, such as +07.
  local digits = string.gsub(old, '^[+-]', '')
  if digits == '' or string.find(digits, '%D') then return {'number'} end
  digits = string.gsub(digits, '^0+', '')
  if #digits > 19 then return {'number'} end
  if digits == '' then digits = '0' elseif string.sub(old, 1, 1) == '-' then digits = '-' .. digits end
  redis.call('HSET', values, field, digits)
end
local function undo()
  if old then redis.call('HSET', values, field, old) else redis.call('HDEL', values, field) end
end
local added = redis.pcall('HINCRBY', values, field, delta)
if type(added) == 'table' and added.err then
  if old then undo() end
  if string.find(added.err, '^ERR ') then return {'number'} end
  return added
end
local new = redis.call('HGET', values, field)
local before = old and counted(field, #old, at) or 0
local more = counted(field, #new, at) - before
if more > 0 then
  local wanted = tonumber(redis.call('GET', used) or 0) + more
  while wanted > quota do
    if purge() == 0 then
      undo()
      return {'quota', whole(wanted)}
    end
    wanted = tonumber(redis.call('GET', used) or 0) + more
  end
end
use(more)
if not old then redis.call('ZADD', order, 0, field) end
return {'number', new}
