-- Arguments: quota, name, what is added. The engine adds: Lua's numbers are
-- exact to 53 bits only. First what nearly all calls are: a number that is
-- there, does not end and keeps its length, so that nothing is to be counted.
local size = redis.call('HSTRLEN', KEYS[1], ARGV[3])
if size > 0 and #ARGV[4] < 20 and not redis.call('ZSCORE', KEYS[3], ARGV[3]) then
  local sum = redis.pcall('HINCRBY', KEYS[1], ARGV[3], ARGV[4])
  if type(sum) == 'number' then
    local text = string.format('%.0f', sum)
    if sum >= 2 ^ 53 or sum <= -2 ^ 53 then text = redis.call('HGET', KEYS[1], ARGV[3]) end
    if #text == size then return {'number', text} end
    local back = string.find(ARGV[4], '^-') and string.sub(ARGV[4], 2) or '-' .. ARGV[4]
    redis.call('HINCRBY', KEYS[1], ARGV[3], back)
  end
end
