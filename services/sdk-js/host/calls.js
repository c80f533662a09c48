export { call } from 'mb:service/calls@1.1.0';
