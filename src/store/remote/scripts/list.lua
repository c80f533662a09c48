-- Arguments: lowest name, what is above the highest, names wanted. Says where
-- the next page begins, then the names.
local from, above, wanted = ARGV[2], ARGV[3], tonumber(ARGV[4])
local some_end = redis.call('EXISTS', ends) == 1
local page = {false}
-- So many at most are looked at where most have ended.
for _ = 1, 10 do
  local found = redis.call('ZRANGEBYLEX', order, from, above, 'LIMIT', 0, wanted + 1)
  for i, field in ipairs(found) do
    if #page == wanted + 1 or i > wanted then
      page[1] = field
      break
    end
    if not (some_end and has_ended(field)) then page[#page + 1] = field end
  end
  if not page[1] or #page == wanted + 1 then return page end
  from, page[1] = '[' .. page[1], false
end
page[1] = string.sub(from, 2)
return page
