//! What clients send and get: frames, HTTP, WebSocket, OpenAPI and MCP.

mod frames;
mod http;
mod mcp;
mod openapi;
mod websocket;
