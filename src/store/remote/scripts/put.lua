-- Arguments: quota, time to live in milliseconds or none, and for each name
-- itself, whether it shall have a value, and the value.
local quota, life = tonumber(ARGV[2]), tonumber(ARGV[3])
local function weigh()
  local wanted, grows = tonumber(redis.call('GET', used) or 0), false
  for i = 4, #ARGV, 3 do
    local before, after = present(ARGV[i]), 0
    if ARGV[i + 1] == '1' then after = counted(ARGV[i], #ARGV[i + 2], life) end
    grows = grows or after > before
    wanted = math.max(wanted + after - before, 0)
  end
  return wanted, grows
end
local wanted, grows = weigh()
while grows and wanted > quota do
  if purge() == 0 then return {'quota', whole(wanted)} end
  wanted, grows = weigh()
end
local end_at = life and whole(now() + life)
for i = 4, #ARGV, 3 do
  local field = ARGV[i]
  if ARGV[i + 1] == '1' then
    put(field, ARGV[i + 2])
    if end_at then
      redis.call('ZADD', ends, end_at, field)
    else
      redis.call('ZREM', ends, field)
    end
  else
    remove(field)
  end
end
redis.call('SET', used, whole(wanted))
return {'written'}
