-- Arguments: largest value, largest sum of them, names. Says a size where it is
-- too large.
local largest, largest_sum = tonumber(ARGV[2]), tonumber(ARGV[3])
local some_end = redis.call('EXISTS', ends) == 1
local found, sum = {}, 0
for i = 4, #ARGV do
  local field = ARGV[i]
  local value = redis.call('HGET', values, field)
  if not value or (some_end and has_ended(field)) then
    value = false
  elseif #value > largest then
    return #value
  else
    sum = sum + #value
    if sum > largest_sum then return sum end
  end
  found[#found + 1] = value
end
return found
