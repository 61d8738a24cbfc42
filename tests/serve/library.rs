//! An independent front end: the driver of libblkio.

use std::os::fd::AsRawFd;

use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::messages::memfd;
use crate::{Folder, MIB, bytes};

#[test]
fn the_driver_of_libblkio_reads_writes_and_flushes() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", 4 * MIB);
    let server = folder.serve(&["disk.img", "--queues", "2"]);
    let features = VirtioFeatureFlags::VERSION_1
        | VirtioFeatureFlags::RING_EVENT_IDX
        | VirtioFeatureFlags::RING_INDIRECT_DESC;
    let offered = features.bits() | 1 << 9 | 1 << 12;
    let vhost = VhostUser::new(server.socket.to_str().unwrap(), offered).unwrap();
    let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
    assert_eq!(transport.max_queues(), Some(2));
    let config = transport.get_config().unwrap();
    assert_eq!(u64::from(config.capacity), 4 * MIB / 512);
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, 2, 256).unwrap();

    let file = memfd(MIB);
    let fd = file.as_raw_fd();
    let region = (
        GuestAddress(0),
        MIB as usize,
        Some(FileOffset::new(file, 0)),
    );
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files([region]).unwrap();
    let at = memory.get_host_address(GuestAddress(0)).unwrap();
    transport
        .map_mem_region(at as usize, MIB as usize, fd, 0)
        .unwrap();
    let mut run = |queue: usize, writes: bool| {
        for number in 0..64usize {
            // SAFETY: the buffers lie in memory that is mapped longer than the requests take.
            let buffer = unsafe { at.add(number * 4096) };
            let offset = (number * 8192) as u64;
            // SAFETY: as above.
            unsafe {
                match writes {
                    true => queues[queue].write_raw(offset, buffer, 4096, number),
                    false => queues[queue].read_raw(offset, buffer, 4096, number),
                }
            }
            .unwrap();
        }
        if queues[queue].avail_notif_needed() {
            transport.get_submission_notifier(queue).notify().unwrap();
        }
        let mut done = 0;
        while done < 64 {
            for completion in queues[queue].completions() {
                assert_eq!(completion.ret, 0);
                done += 1;
            }
        }
    };
    for number in 0..64u64 {
        let data = [0x80 | number as u8; 4096];
        memory
            .write_slice(&data, GuestAddress(number * 4096))
            .unwrap();
    }
    run(0, true);
    for number in 0..64u64 {
        memory
            .write_slice(&[0; 4096], GuestAddress(number * 4096))
            .unwrap();
    }
    run(1, false);
    for number in 0..64u64 {
        let expected = [0x80 | number as u8; 4096];
        let mut data = [0; 4096];
        memory
            .read_slice(&mut data, GuestAddress(number * 4096))
            .unwrap();
        assert!(data == expected);
        assert!(bytes(&image, number * 16, 4096) == expected);
    }
    server.end();
}
