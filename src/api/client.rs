//! Who a request comes from, as far as the queue needs to tell clients apart.

use std::convert::Infallible;
use std::net::SocketAddr;

use axum::extract::{ConnectInfo, FromRequestParts};
use axum::http::request::Parts;

/// The user that authentication has found; put into the request by it.
#[derive(Debug, Clone)]
pub struct User(pub String);

/// A client: its user name, else the address it connects from, else nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client(pub String);

impl<S: Sync> FromRequestParts<S> for Client {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let user = parts.extensions.get::<User>().map(|user| user.0.clone());
        let address = || {
            let info = parts.extensions.get::<ConnectInfo<SocketAddr>>()?;
            Some(info.0.ip().to_string())
        };
        Ok(Self(user.or_else(address).unwrap_or_default()))
    }
}
