// What would answer something else than elsewhere says so instead. `Intl` is absent, and QuickJS
// ignores languages, time zones and options where it is.
const absent = (name, instead) => () => {
  throw new Error(`${name} needs Intl, which is absent: ${instead}`);
};
const PACKAGE = 'format it yourself or take a package, as @formatjs/intl';

for (const [type, name] of [
  [Number, 'Number.prototype.toLocaleString'],
  [BigInt, 'BigInt.prototype.toLocaleString'],
  [Date, 'Date.prototype.toLocaleString'],
  [Date, 'Date.prototype.toLocaleDateString'],
  [Date, 'Date.prototype.toLocaleTimeString'],
]) {
  type.prototype[name.split('.')[2]] = absent(name, PACKAGE);
}
String.prototype.localeCompare = absent(
  'String.prototype.localeCompare',
  'compare with < and >, which go by code units, or take a package',
);
for (const name of ['toLocaleLowerCase', 'toLocaleUpperCase']) {
  const plain = String.prototype[name.replace('Locale', '')];
  String.prototype[name] = function withLocale(locales) {
    const special = [locales ?? []].flat().some((locale) => /^(tr|az|lt)\b/i.test(locale));
    if (special) absent(`String.prototype.${name}('${locales}')`, PACKAGE)();
    return plain.call(this);
  };
}
