//! Operations that are under way at the same time.

use super::*;
use crate::testing::in_tmpfs;

/// Polls all of them, so that they are issued together, and then waits for each.
async fn together(mut operations: Vec<Whole>) -> Vec<io::Result<()>> {
    let mut results: Vec<_> = operations.iter_mut().map(poll_once).collect();
    for (result, operation) in results.iter_mut().zip(operations) {
        if result.is_pending() {
            *result = Poll::Ready(operation.await);
        }
    }
    let ready = |result| match result {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("it was waited for"),
    };
    results.into_iter().map(ready).collect()
}

#[test]
fn neighbours_that_are_issued_together_have_their_bytes_each() {
    const LEN: usize = 4096;
    each(|ring| {
        let file = engine_file(&[]);
        let at = |index: usize| (index * LEN) as u64;
        run(ring, async {
            let writes = (0..200)
                .map(|index| ring.write_all_at(&file, at(index), segments(&[index as u8; LEN])));
            for result in together(writes.collect()).await {
                result.unwrap();
            }
            let to: Vec<_> = (0..210).map(|_| segments(&[0xff; LEN])).collect();
            let reads = to
                .iter()
                .enumerate()
                .map(|(index, to)| ring.read_zero_filled_at(&file, at(index), to.clone()));
            for result in together(reads.collect()).await {
                result.unwrap();
            }
            for (index, to) in to.iter().enumerate() {
                let expected = if index < 200 { index as u8 } else { 0 };
                assert!(bytes(to).iter().all(|byte| *byte == expected), "{index}");
            }
        });
    });
}

#[test]
fn neighbours_that_fail_each_have_their_error() {
    each(|ring| {
        let named = tempfile::NamedTempFile::new().unwrap();
        let read_only = File::from(std::fs::File::open(named.path()).unwrap());
        run(ring, async {
            let writes = [0, 4096, 8192]
                .map(|offset| ring.write_all_at(&read_only, offset, segments(&[1; 4096])));
            for result in together(writes.into()).await {
                let error = result.unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EBADF));
            }
            let reads = [0, 4096]
                .map(|offset| ring.read_exact_at(&read_only, offset, segments(&[1; 4096])));
            for result in together(reads.into()).await {
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            }
        });
    });
}

#[test]
fn neighbours_for_which_there_is_no_room_each_have_their_error() {
    let Some(folder) = in_tmpfs(
        "ring::tests::together::neighbours_for_which_there_is_no_room_each_have_their_error",
        "40k",
    ) else {
        return;
    };
    each(|ring| {
        let path = folder.join("file");
        let flags = OFlags::RDWR | OFlags::DSYNC | OFlags::CREATE;
        let fd = rustix::fs::open(&path, flags, rustix::fs::Mode::RWXU).unwrap();
        let file = File::from(fd);
        run(ring, async {
            let writes = (0..20).map(|index| {
                ring.write_all_at(&file, index * 4096, segments(&[index as u8 + 1; 4096]))
            });
            let results = together(writes.collect()).await;
            let (mut written, mut full) = (0, 0);
            for (index, result) in results.into_iter().enumerate() {
                let Err(error) = result else {
                    let to = segments(&[0; 4096]);
                    let offset = index as u64 * 4096;
                    ring.read_exact_at(&file, offset, to.clone()).await.unwrap();
                    assert!(bytes(&to).iter().all(|byte| *byte == index as u8 + 1));
                    written += 1;
                    continue;
                };
                assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                full += 1;
            }
            assert!(written > 0 && full >= 10, "{written} written");
        });
        std::fs::remove_file(path).unwrap();
    });
}

#[test]
fn long_reads_at_once_have_their_bytes_each() {
    const LEN: usize = 256 << 10;
    let content: Vec<u8> = (0..8 * LEN).map(|at| (at / 512) as u8).collect();
    each(|ring| {
        let file = file();
        rustix::io::pwrite(&file, &content, 0).unwrap();
        run(ring, async {
            let to: Vec<_> = (0..8).map(|_| segments(&[0; LEN])).collect();
            let reads = to
                .iter()
                .enumerate()
                .map(|(index, to)| ring.read_exact_at(&file, (index * LEN) as u64, to.clone()));
            for (index, result) in together(reads.collect()).await.into_iter().enumerate() {
                result.unwrap();
                assert!(
                    bytes(&to[index]) == content[index * LEN..][..LEN],
                    "read {index}"
                );
            }
        });
    });
}
