// A Promise that uses the job queue of `jobs.js`: QuickJS's own queue is never run inside of a call.
import './configure.js';
import 'core-js/actual/promise';
