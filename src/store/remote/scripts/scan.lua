-- Arguments: cursor, entries wanted. Says where the next page begins, then of
-- each entry its name, its value and when it ends, if it does.
local found = redis.call('HSCAN', values, ARGV[2], 'COUNT', ARGV[3])
local some_end = redis.call('EXISTS', ends) == 1
local page = {found[1]}
for i = 1, #found[2], 2 do
  local field = found[2][i]
  page[#page + 1] = field
  page[#page + 1] = found[2][i + 1]
  page[#page + 1] = some_end and redis.call('ZSCORE', ends, field) or ''
end
return page
