const data = require('./data.json');

exports.double = (n) => n * data.factor;
