-- Argument: name.
local field = ARGV[2]
if redis.call('HEXISTS', values, field) == 0 or has_ended(field) then return 0 end
return 1
