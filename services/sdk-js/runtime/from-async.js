import './configure.js';
import 'core-js/actual/array/from-async';
