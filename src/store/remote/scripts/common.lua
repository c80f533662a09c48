-- What the server holds of one service: the values by bucket NUL key, the same
-- names in order, when those end that do (milliseconds), and what all count.
local values, order, ends, used = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
-- What an entry counts beside its name and its value.
local overhead = tonumber(ARGV[1])

-- One instant for the whole script.
local clock
local function now()
  if not clock then
    local time = redis.call('TIME')
    clock = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return clock
end

local function has_ended(field)
  local at = redis.call('ZSCORE', ends, field)
  return at and tonumber(at) <= now()
end

local function counted(field, size, end_at)
  return overhead + #field + size + (end_at and 16 or 0)
end

local function present(field)
  local size = redis.call('HSTRLEN', values, field)
  if size == 0 and redis.call('HEXISTS', values, field) == 0 then return 0 end
  return counted(field, size, redis.call('ZSCORE', ends, field))
end

-- Lua would write large numbers with an exponent.
local function whole(number) return string.format('%.0f', number) end

local function use(change)
  if change ~= 0 then
    local sum = tonumber(redis.call('GET', used) or 0) + change
    redis.call('SET', used, whole(math.max(sum, 0)))
  end
end

local function put(field, value)
  if redis.call('HSET', values, field, value) == 1 then
    redis.call('ZADD', order, 0, field)
  end
end

local function remove(field)
  redis.call('HDEL', values, field)
  redis.call('ZREM', order, field)
  redis.call('ZREM', ends, field)
end

-- Removes some of what has ended; says how much.
local function purge()
  if redis.call('EXISTS', ends) == 0 then return 0 end
  local gone = redis.call('ZRANGEBYSCORE', ends, '-inf', now(), 'LIMIT', 0, 1000)
  local freed = 0
  for _, field in ipairs(gone) do
    freed = freed + present(field)
    remove(field)
  end
  use(-freed)
  return #gone
end
