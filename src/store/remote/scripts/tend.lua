-- Removes some of what has ended; says how much, and what is used.
local gone = purge()
return {gone, redis.call('GET', used) or '0'}
