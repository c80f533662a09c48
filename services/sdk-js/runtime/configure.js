import configure from 'core-js/configurator';

configure({ usePolyfill: ['Promise', 'Array.fromAsync'] });
