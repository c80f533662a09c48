export { call } from 'mb:service/calls@1.0.0';
